"""Image formats: structure checks, and Pillow for formats that DALI decodes differently."""
