"""A checkpoint as other engines read it: vLLM and SGLang, llama.cpp, Transformers."""
