"""The run-time checker of public signatures."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int serves where a float is asked for, as for mypy
