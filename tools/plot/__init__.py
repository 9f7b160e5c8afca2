"""Pictures for the documents, made from the code that they explain."""
