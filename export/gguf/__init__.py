"""GGUF files to checkpoints: llama.cpp's file -> a folder in Hugging Face's format, weights and tokenizer. Needs no PyTorch."""
