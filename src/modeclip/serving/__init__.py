"""The service: classification, vectors, routing and search over HTTP, computed in batches of all requests in flight."""
