"""``python -m bench``: the serving benchmark."""

from bench.run import main

if __name__ == "__main__":
    main()
