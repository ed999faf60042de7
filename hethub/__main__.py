"""`python -m hethub`."""

from hethub.cli.main import main

main()
