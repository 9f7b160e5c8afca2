"""What a run would need and how long it would take on other machines: memory, communication, time, and a layout. Nothing is started."""
