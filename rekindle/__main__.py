"""`python -m rekindle`, as torchrun starts it."""

from rekindle.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
