"""The clients' side: connections, requests and their answers."""
