"""An HTTP server with OpenAI's interface, in which compression is a parameter of a request."""
