"""Everything that is tried."""

from fuzzing import data_files, functions, run_directories

TARGETS = [
    *run_directories.TARGETS,
    *data_files.TARGETS,
    *functions.TARGETS,
]
