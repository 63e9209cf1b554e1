"""Compile a captured model: config, jobs, backends, the driver and the worker process."""
