"""attngen inside other systems. Each module imports its host only when it is imported itself."""
