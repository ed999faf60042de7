"""`python -m hethub`."""

from hethub.cli.main import run

run()
