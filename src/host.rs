//! What the engine may ask of the world that it runs in.
