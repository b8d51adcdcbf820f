"""The command line: parse, call one function of `run` or `report`, print."""
