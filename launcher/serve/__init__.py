"""An engine behind OpenAI's completions protocol: what a run measures, to be tried by hand and by others' clients."""
