"""A server with OpenAI's API over one loaded checkpoint. It needs the extra `server`."""
