"""Pure mathematics of the method on tensors and arrays: no models, no files, no text."""
