"""PEFT's adapter files and models."""
