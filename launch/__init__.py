"""The programs, one a file; `hiar-jax COMMAND` runs them wherever it is."""
