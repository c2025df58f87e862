"""Models in GGUF files, as llama.cpp reads them, made into folders that both engines load."""
