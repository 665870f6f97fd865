"""Device profiles: what a device class can do (`profile`), and this machine (`this_machine`)."""
