"""Many ranks: who they are, how they meet and talk, and how a job ends."""
