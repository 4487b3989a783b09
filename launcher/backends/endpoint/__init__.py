"""A server that somebody runs, asked over HTTP. No torch: any machine can be the client."""
