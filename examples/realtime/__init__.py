"""A laboratory's own tornado application with a broker inside: images are asked for and measured in real time."""
