"""The operators: one a file, with its schema, fake implementation, autograd and public function."""
