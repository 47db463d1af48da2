"""The demo checkpoint's world: Fluent Emoji composed into scenes, with captions and maps computed from the layers."""
