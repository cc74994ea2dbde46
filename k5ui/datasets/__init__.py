"""The datasets of a workspace as the page works on them: known files, scans, pictures, captions, findings."""
