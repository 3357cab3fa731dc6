"""`python -m petalite` is the command `petalite`; server processes of the demo are started this way."""

from petalite.cli import main

if __name__ == "__main__":
    main()
