"""An OpenAI-compatible HTTP server on the engine. `app.make_app` puts it together; `run.serve` runs it."""
