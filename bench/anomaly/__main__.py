"""``python -m bench.anomaly``: the anomaly benchmark."""

from bench.anomaly.run import main

if __name__ == "__main__":
    main()
