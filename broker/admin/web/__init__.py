"""The page at `/` and the JavaScript client, as files of the package."""
