"""The commands of the console script, one file each: `add_arguments(parser)`, and `run(arguments)` with the exit status."""

UNAVAILABLE = 75  # exit status of "try again later", by the convention of sysexits.h
