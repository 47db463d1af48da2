"""A web page for a checkpoint, mounted in the server at `/`: text to image, image tasks, editing and chat.

The page goes through the server's engine. It knows no sampler and no model.
"""
