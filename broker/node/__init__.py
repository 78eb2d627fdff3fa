"""The broker as an object in any process."""
