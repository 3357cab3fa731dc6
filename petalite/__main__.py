"""`python -m petalite`."""

from petalite.cli import main

if __name__ == "__main__":
    main()
