//! A transport that delivers commands again: each is carried out once, and whoever asks again gets the first answer.

use super::link::behind;
use crate::engine::bitmap::Page;
use crate::engine::manager::Order;
use crate::engine::message::ToManager;
use crate::engine::peer::command::{PeerCommand, opcode};
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::engine::request::RequestKind;
use crate::hosts::sim::world::{Config, MS, SECOND, World};

const WRITE: RequestKind = RequestKind::Write { fua: false };

/// Node 1 has fetched everything from node 0, has said so, and is about to ask whether that was all.
fn about_to_finish(seed: u64, keeping: u8) -> World {
    let mut world = behind(seed, Config::default());
    world.keep_copies(Some(keeping));
    world.catch(opcode::SYNC_FINISH);
    world.heal(0, 1);
    world.run_until("everything is fetched", 5 * SECOND, |world| {
        world.caught() > 0
    });
    world.keep_copies(None);
    assert!(world.kept() > 0);
    assert_eq!(world.peer(0, 1).out_of_sync_bytes, 0);
    world
}

#[test]
fn a_report_that_arrives_again_clears_no_newer_bit() {
    for seed in 0..5 {
        let mut world = about_to_finish(seed, opcode::RESYNC_DONE);
        let slot = world.peer(0, 1).slot;
        let engine = world.nodes[0].engine.as_ref().expect("it runs");
        // A write that node 1 misses, and another resync read of its blocks.
        engine.shared.served[slot].set_range(0..3);
        let mut page = Page::boxed();
        page.set_range(0..3);
        let missed = ToManager::Retire(0, Vec::new(), vec![(slot, vec![(0, page)])]);
        world.tell_manager(0, missed);
        world.repeat_kept();
        world.run_for(20 * MS);
        assert_eq!(world.peer(0, 1).out_of_sync_bytes, 3 * 4096);
        world.let_go();
        world.settle();
    }
}

#[test]
fn a_resync_read_that_arrives_again_leaves_no_entry_behind() {
    for seed in 0..5 {
        let mut world = about_to_finish(seed, opcode::RESYNC_READ);
        let slot = world.peer(0, 1).slot;
        let served = |world: &World| {
            let shared = &world.nodes[0].engine.as_ref().expect("it runs").shared;
            shared.served[slot].count(0..shared.geometry.granules())
        };
        assert_eq!(served(&world), 0);
        let bytes = world.resynced_bytes;
        world.repeat_kept();
        world.run_for(20 * MS);
        assert_eq!(served(&world), 0);
        assert_eq!(world.resynced_bytes, bytes);
        world.let_go();
        world.settle();
    }
}

#[test]
fn a_resync_goes_on_when_its_data_gets_lost_on_the_way() {
    for seed in 0..10 {
        let mut world = behind(seed, Config::default());
        world.keep_copies(Some(opcode::RESYNC_READ));
        world.lose_answers(Some((1, opcode::RESYNC_READ)));
        world.heal(0, 1);
        world.run_until("it pulls", SECOND, |world| world.kept() > 0);
        let link = world.link_ids();
        world.lose_answers(None);
        world.keep_copies(None);
        // Some of them while the first is still being read.
        world.repeat_kept();
        world.settle();
        assert_eq!(world.link_ids(), link);
    }
}

/// Two reads of the same blocks under way at once would leave entries that nobody can tell apart.
#[test]
fn a_resync_read_keeps_its_number_until_it_is_served() {
    let mut world = behind(1, Config::default());
    world.catch(opcode::WRITE);
    world.carry_out(1, Order::PauseResync);
    world.heal(0, 1);
    world.run_until("the resync is held", SECOND, |world| {
        world.peer(1, 0).conn == ConnState::PausedSyncT
    });
    world.run_for(5 * MS);
    // It has its range at node 0 until node 1 has it too.
    world.submit(0, 0, WRITE, 211, 24);
    world.run_until("the write is on its way", SECOND, |world| {
        world.caught() == 1
    });
    world.keep_copies(Some(opcode::RESYNC_READ));
    world.carry_out(1, Order::ResumeResync);
    world.run_for(900 * MS);
    let numbers: Vec<u64> = world
        .kept_commands()
        .into_iter()
        .filter_map(|command| match command {
            PeerCommand::ResyncRead { span, sequence, .. } if span.lba() == 208 => Some(sequence),
            _ => None,
        })
        .collect();
    assert!(numbers.len() > 2, "{numbers:?}");
    assert!(numbers.iter().all(|&number| number == numbers[0]));
    world.let_go();
    world.settle();
}

#[test]
fn nothing_is_fetched_again_before_the_report_of_it_is_answered() {
    let mut world = behind(1, Config::default());
    world.catch(opcode::RESYNC_DONE);
    world.keep_copies(Some(opcode::SYNC_FINISH));
    world.heal(0, 1);
    world.run_until("it is reported", SECOND, |world| world.caught() > 0);
    world.run_for(100 * MS);
    assert_eq!(world.kept(), 0, "the next sweep would come to it");
    world.let_go();
    world.settle();
}

#[test]
fn bits_that_arrive_again_are_not_set_again() {
    for keeping in [opcode::BITMAP_OR, opcode::OUT_OF_SYNC] {
        for seed in 0..5 {
            let mut world = behind(seed, Config::default());
            world.keep_copies(Some(keeping));
            world.catch(opcode::BITMAP_END);
            world.heal(0, 1);
            world.run_until("bitmaps are exchanged", SECOND, |world| {
                world.peer(0, 1).conn == ConnState::WFBitMapS && world.caught() > 0
            });
            // What was caught may be node 1's: node 0's channels are to know it too.
            world.run_for(MS);
            world.write(0, 9000, 8);
            world.let_go();
            world.settle();
            assert!(world.kept() > 0);
            world.repeat_kept();
            world.run_for(20 * MS);
            assert!(world.is_settled(), "{}", world.describe());
            world.check_replicas();
        }
    }
}

#[test]
fn a_resync_starts_and_finishes_once_when_each_answer_gets_lost() {
    for (from, command) in [
        (1, opcode::SYNC_FINISH),
        (0, opcode::SYNC_START),
        (0, opcode::BITMAP_END),
        (1, opcode::BITMAP_OR),
        (1, opcode::RESYNC_DONE),
        (0, opcode::STATE_PUT),
    ] {
        for seed in 0..5 {
            let mut world = behind(seed, Config::default());
            world.heal(0, 1);
            world.run_until("the handshake is done", SECOND, |world| {
                world.peer(0, 1).conn >= ConnState::Connected
                    && world.peer(1, 0).conn >= ConnState::Connected
            });
            let link = world.link_ids();
            world.keep_copies(Some(command));
            world.lose_answers(Some((from, command)));
            for _ in 0..200 {
                world.run_for(MS / 2);
                world.repeat_kept();
            }
            world.lose_answers(None);
            world.keep_copies(None);
            world.settle();
            assert_eq!(world.link_ids(), link, "{command:#x}");
        }
    }
}

#[test]
fn a_promotion_that_is_asked_for_again_later_is_in_nobodys_way() {
    let mut world = World::clean_cluster(1, Config::default());
    world.keep_copies(Some(opcode::PREPARE));
    world.promote(1);
    world.carry_out(1, Order::Demote);
    world.run_for(5 * MS);
    world.keep_copies(None);
    assert_eq!(world.kept(), 1);
    world.repeat_kept();
    world.run_for(5 * MS);
    world.promote(0);
}

#[test]
fn a_promotion_that_is_given_up_late_takes_back_no_later_one() {
    let promote = Order::Promote { force: false };
    for seed in 0..10 {
        let mut world = World::clean_cluster(seed, Config::default());
        // Node 0 agrees, and node 1 does not hear of it in time.
        world.keep_copies(Some(opcode::PREPARE));
        world.lose_answers(Some((1, opcode::PREPARE)));
        assert!(world.ordered(1, promote.clone()).is_err());
        world.catch(opcode::ABORT);
        world.repeat_kept();
        world.run_until("it is given up", SECOND, |world| world.caught() == 1);
        let second = world.order(1, promote.clone());
        world.run_until("node 0 has agreed again", SECOND, |world| world.kept() == 1);
        world.run_for(5 * MS);
        world.let_go();
        world.run_for(5 * MS);
        assert!(world.ordered(0, promote.clone()).is_err());
        world.repeat_kept();
        world.run_until("node 1 has the answer", SECOND, |world| {
            world.outcome(1, second).is_some()
        });
        assert!(world.is_primary(1) && !world.is_primary(0));
    }
}

#[test]
fn a_promotion_that_was_given_up_before_its_answer_came_is_taken_back() {
    let promote = Order::Promote { force: false };
    let mut world = World::clean_cluster(1, Config::default());
    world.keep_copies(Some(opcode::PREPARE));
    world.lose_answers(Some((1, opcode::PREPARE)));
    assert!(world.ordered(1, promote).is_err());
    world.keep_copies(None);
    world.repeat_kept();
    world.run_for(5 * MS);
    world.promote(0);
}

#[test]
fn a_generation_that_arrives_again_is_not_the_current_one_again() {
    for seed in 0..5 {
        let config = Config {
            nodes: 3,
            ..Config::default()
        };
        let mut world = World::clean_cluster(seed, config);
        world.promote(0);
        world.keep_copies(Some(opcode::NEW_GENERATION));
        world.cut(0, 1);
        world.cut(1, 2);
        world.write(0, 0, 8);
        world.keep_copies(None);
        assert_eq!(world.kept(), 1);
        // The next one, in the same session.
        let first = world.state(2).generations.current;
        world.carry_out(0, Order::Detach);
        world.write(0, 100, 8);
        let current = world.state(2).generations.current;
        assert_ne!(current, first);
        assert_eq!(current, world.state(0).generations.current);
        world.repeat_kept();
        world.run_for(20 * MS);
        assert_eq!(world.state(2).generations.current, current);
    }
}

#[test]
fn a_goodbye_that_arrives_again_is_answered_when_the_first_has_been_carried_out() {
    for seed in 0..150 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.keep_copies(Some(opcode::GOODBYE));
        world.lose_answers(Some((0, opcode::GOODBYE)));
        let id = world.order(0, Order::Disconnect { node_id: None });
        while world.kept() == 0 {
            world.step();
        }
        world.repeat_kept();
        while world.outcome(0, id).is_none() {
            world.step();
        }
        // Whoever has disconnected goes on alone: the other one must know, whatever happens.
        world.kill(1);
        world.start(1);
        assert_eq!(world.state(1).disk, DiskState::Outdated, "seed {seed}");
    }
}

#[test]
fn a_hello_that_arrives_late_ends_no_later_session() {
    for seed in 0..10 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.keep_copies(Some(opcode::HELLO_PUT));
        for _ in 0..3 {
            world.reset(0, 1);
            world.run_for(300 * MS);
        }
        if seed % 2 == 1 {
            world.kill(1);
            world.restart(1);
        }
        world.settle();
        world.keep_copies(None);
        assert!(world.kept() >= 6);
        let links = world.link_ids();
        world.repeat_kept();
        world.run_for(300 * MS);
        assert!(world.is_settled(), "{}", world.describe());
        assert_eq!(world.link_ids(), links);
    }
}

/// Node 1 knows nothing of the times before, so it cannot know which of two Hellos is the later one.
#[test]
fn a_hello_from_before_both_nodes_started_again_does_not_keep_them_apart() {
    for seed in 0..10 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.keep_copies(Some(opcode::HELLO_PUT));
        world.reset(0, 1);
        world.run_for(300 * MS);
        world.keep_copies(None);
        for node in 0..2 {
            world.kill(node);
            world.restart(node);
        }
        world.settle();
        world.repeat_kept();
        world.run_for(MS);
        world.settle();
    }
}

#[test]
fn what_a_peer_told_before_replaces_nothing_newer() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, Config::default());
        // The first promotion of all starts a generation; the one below is not to.
        world.carry_out(1, Order::Promote { force: false });
        world.carry_out(1, Order::Demote);
        world.reset(0, 1);
        world.run_for(2 * MS);
        // Node 1 enters the session, and node 0 does not hear that it may.
        world.keep_copies(Some(opcode::CONFIRM));
        world.lose_answers(Some((0, opcode::CONFIRM)));
        world.catch(opcode::STATE_PUT);
        world.run_until("node 1 has entered", SECOND, |world| {
            world.peer(1, 0).conn == ConnState::Connected && world.kept() > 0
        });
        world.run_for(5 * MS);
        world.carry_out(1, Order::Promote { force: false });
        world.carry_out(1, Order::Demote);
        assert_eq!(world.peer(0, 1).conn, ConnState::WFReportParams);
        world.lose_answers(None);
        // All that it has told, in any order.
        world.let_go();
        world.run_for(MS);
        world.repeat_kept();
        world.run_until("node 0 has entered", SECOND, |world| {
            world.peer(0, 1).conn == ConnState::Connected
        });
        world.run_for(MS);
        assert_eq!(world.peer(0, 1).role, Role::Secondary);
    }
}

#[test]
fn a_write_that_arrives_again_is_applied_once() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.keep_copies(Some(opcode::WRITE));
        if seed % 2 == 0 {
            world.lose_answers(Some((0, opcode::WRITE)));
        }
        world.submit(0, 0, WRITE, 8, 8);
        world.run_until("it has arrived", SECOND, |world| world.kept() == 1);
        world.lose_answers(None);
        world.keep_copies(None);
        if seed % 2 == 0 {
            // While it is on its way to the disk, and its answer counts.
            world.repeat_kept();
            world.wait_for_io();
        } else {
            world.wait_for_io();
            world.write(0, 4, 8);
            world.repeat_kept();
        }
        world.run_for(20 * MS);
        assert!(world.is_settled(), "{}", world.describe());
        world.check_replicas();
    }
}
