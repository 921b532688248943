"""What a model is: what is known of it before it is loaded, its trainer, its tiny checkpoint. A model is a folder here."""
