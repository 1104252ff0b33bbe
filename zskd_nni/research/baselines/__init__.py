"""What the methods are compared with and that is no transfer method: students that read real labels."""
