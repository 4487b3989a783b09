"""An engine behind OpenAI's completions API: the engine of a run, for trying by hand and for other clients."""
