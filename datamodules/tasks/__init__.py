"""One file a task: records, prompt template, verifier and, where it has them, demonstrations."""
