"""GGUF files of Hugging Face checkpoints, for llama.cpp and what builds on it. Needs the extra ``leanstep[gguf]``."""
