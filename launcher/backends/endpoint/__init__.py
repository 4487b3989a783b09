"""A running inference server, called over HTTP. No torch: any machine can be the client."""
