"""Pure: builds the OCI runtime configuration from the request and from facts read before."""
