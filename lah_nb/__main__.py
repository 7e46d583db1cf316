"""`python -m lah_nb` is `lah-nb`"""
import sys

from .command.cli import main

sys.exit(main())
