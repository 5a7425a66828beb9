"""Everything that is tried."""

from fuzzing import checkpoints, data_files, functions, run_directories

TARGETS = [
    *run_directories.TARGETS,
    *data_files.TARGETS,
    *checkpoints.TARGETS,
    *functions.TARGETS,
]
