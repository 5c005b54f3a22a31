"""``python -m bench``: the serving benchmark."""

from bench.serving import main

if __name__ == "__main__":
    main()
