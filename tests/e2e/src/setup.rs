//! The layouts in which every scenario must pass.

use metanode_client::Client;

use crate::{Home, Node};

/// How nodes are run, one after the other on one folder, and how clients talk to them.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Shards of the first node, the second, and so on; then from the start again.
    pub shards: &'static [u16],
    /// Whether clients heed the shard map.
    pub shard_aware: bool,
}

impl Layout {
    /// Runs a scenario in this layout.
    pub fn run(self, scenario: impl AsyncFnOnce(&mut Setup)) {
        crate::scenario(async {
            let mut setup = Setup::start(self).await;
            scenario(&mut setup).await;
            setup.end().await;
        });
    }
}

/// A folder, the node on it and a client of it.
pub struct Setup {
    running: Option<(Node, Client)>, // goes first: a node must not write to a folder that is being removed
    home: Home,
    layout: Layout,
    lives: usize,
}

impl Setup {
    async fn start(layout: Layout) -> Self {
        let mut setup = Self { home: Home::new(), layout, lives: 0, running: None };
        setup.begin().await;
        setup
    }

    async fn begin(&mut self) {
        let shards = self.layout.shards[self.lives % self.layout.shards.len()];
        let node = self.home.start(shards);
        let client = self.home.client(&node, self.layout.shard_aware).await;
        assert_eq!(client.shards(), shards);
        client.connect_all_shards().await.expect("every shard takes connections");
        let connections = if self.layout.shard_aware { usize::from(shards) } else { 1 };
        assert_eq!(client.wire_counters().connections, connections);
        self.lives += 1;
        self.running = Some((node, client));
    }

    async fn end(&mut self) {
        let (node, client) = self.running.take().expect("a node runs between two restarts");
        client.close().await;
        node.stop();
    }

    /// Stops the node and starts the next one of the layout on the same folder.
    pub async fn restart(&mut self) {
        self.end().await;
        self.begin().await;
    }

    /// The folder.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The node.
    pub fn node(&self) -> &Node {
        &self.running.as_ref().expect("a node runs between two restarts").0
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.running.as_ref().expect("a node runs between two restarts").1
    }
}
