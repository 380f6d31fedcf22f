"""``python -m wsserver``."""

from wsserver.cli import main

if __name__ == "__main__":
    main()
