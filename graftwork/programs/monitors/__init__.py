"""Where `graftwork monitor` can forward a run's metrics to. Each module imports its package when it is asked to."""
