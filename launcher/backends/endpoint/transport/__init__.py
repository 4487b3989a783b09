"""HTTP/1.1 to one server: connections, requests, arrival times, and the kinds of failures."""
