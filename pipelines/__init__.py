"""Ray and MLflow around gru_core: the driver, the worker, the search, the tracker, the command line."""
