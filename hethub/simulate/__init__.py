"""The simulator: the program executed in predicted time."""
